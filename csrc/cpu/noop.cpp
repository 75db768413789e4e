// Placeholder until the first family lands.
