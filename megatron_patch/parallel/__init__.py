"""Ranks: pure arithmetic in `grid`, process groups in `mesh`, communication in `collectives`."""
