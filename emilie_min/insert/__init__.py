"""Object insertion (Sec. 6.1): where an inset goes, what it shows, and drawing it there."""
