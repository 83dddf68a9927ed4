"""Audio: files, what they hold, and what training and tests do to it (codecs, rooms, noise, domains)."""
