"""One table or figure of the paper a file: its variants, what the paper has, what came out here."""
