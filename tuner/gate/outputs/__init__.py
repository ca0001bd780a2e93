"""What a gate leaves behind: JSON, JUnit XML, Markdown and a plot."""
