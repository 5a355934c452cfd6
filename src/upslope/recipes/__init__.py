"""One file, one algorithm box; session.py is the loop around all of them."""
