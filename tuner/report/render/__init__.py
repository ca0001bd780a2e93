"""One renderer for each medium: the only places that draw tables, markup and pages."""
