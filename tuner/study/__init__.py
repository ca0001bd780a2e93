"""A study on disk: its folder, files, locks, and what plans and device maps it leaves."""
