"""Images in: files and archives as people have them, decoded to uint8."""
