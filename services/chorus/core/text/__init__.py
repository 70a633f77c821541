"""From tokens to text: whole characters only, stop strings withheld until decided, and when a choice ends."""
