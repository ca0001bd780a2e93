"""What people see of a study: documents, tables, plots and pages, all derived from records."""
