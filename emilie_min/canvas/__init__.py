"""One picture's session: the tree of edits, pictures and masks in and out, saving and opening."""
