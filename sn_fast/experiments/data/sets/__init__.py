"""One file per data set (or family of sets): where its files are, what they must contain, how they are read."""
