"""Building blocks under the import paths that clients use."""
