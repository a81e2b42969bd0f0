"""What a user writes: the schema, its loader, presets, plugins, and the errors that name place and remedy."""
