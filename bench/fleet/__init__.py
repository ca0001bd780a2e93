"""The fleet: worker processes, one a device, commanded and watched from a driver that loads no torch."""
