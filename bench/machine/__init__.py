"""The machine: hardware, software, and what its sensors say while a run goes on."""
