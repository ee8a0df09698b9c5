"""Running long work: progress, random numbers, the work folder, Ray."""
