"""Files that are written whole or not at all, documents that are checked before they are used, and places for output."""
