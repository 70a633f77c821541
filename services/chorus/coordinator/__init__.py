"""The coordinator: places each request on a runner that can serve it, and streams its tokens back."""
