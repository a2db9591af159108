"""One-off tools and measurements: thin, and imported by nothing."""
