"""Weight files: indexed, read strictly and safely, converted, downloaded; and files written whole or not at all."""
