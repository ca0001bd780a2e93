"""The gate: baseline and candidate measured side by side, and a verdict that says how sure it is."""
