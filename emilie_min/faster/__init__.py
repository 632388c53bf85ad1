"""The same edit sooner or in less memory, attached to the method from outside."""
