"""From numbers to what people see: tables, figures, pages, the live display."""
