"""One model on many devices: which axis of an array lies along which axis of a mesh, and what runs between them."""
