"""Augmentation and decoding of whole batches on the device, by draws that the workers make."""
