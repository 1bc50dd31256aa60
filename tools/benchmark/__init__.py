"""What measures this project's own speed, and what fills the tables of its own pages."""
