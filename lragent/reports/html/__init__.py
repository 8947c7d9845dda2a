"""Self-contained HTML pages of reports: tables and inline SVG charts, no scripts, no other files."""
