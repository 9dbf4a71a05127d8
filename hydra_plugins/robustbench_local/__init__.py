"""What Hydra finds by itself. Light: it is imported for `--help` as well."""
