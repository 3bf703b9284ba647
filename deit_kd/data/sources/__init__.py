"""Where images and labels come from: folders, shards, tables, and the sets that torchvision knows."""
