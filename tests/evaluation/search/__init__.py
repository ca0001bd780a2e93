"""How good the search is, shown on landscapes that were measured exhaustively, or simulated and called so."""
