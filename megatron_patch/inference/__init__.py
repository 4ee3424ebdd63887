"""A loaded model on any layout: what it says of given tokens, and what it writes after them."""
