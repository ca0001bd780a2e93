"""Where to cut: splits of layers over devices, balanced stages, and device maps."""
