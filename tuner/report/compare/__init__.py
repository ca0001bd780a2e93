"""Studies side by side: of one machine on different nights, or of different machines."""
