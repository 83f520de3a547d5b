"""The paper's tables, measured beside published, and how they are printed."""
