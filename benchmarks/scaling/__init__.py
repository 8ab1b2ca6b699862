"""What the parts of this package cost as a run grows, and how."""
