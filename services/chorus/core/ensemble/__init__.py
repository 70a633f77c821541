"""How several generations become one answer."""
