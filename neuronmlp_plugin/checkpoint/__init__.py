"""The on-disk format (FORMAT.md): schema, reader and writer. The file alone rebuilds the model."""
