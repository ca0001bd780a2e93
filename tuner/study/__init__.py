"""A study on disk: its folder, files, and what plans and device maps it leaves."""
