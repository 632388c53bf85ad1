"""Weight files: read strictly and safely, converted, downloaded; tokenizers; files written whole or not at all."""
