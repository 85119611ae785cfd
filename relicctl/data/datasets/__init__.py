"""Data sets: folders, archives, torchvision and generated images behind one interface."""
