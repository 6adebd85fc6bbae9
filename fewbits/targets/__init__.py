"""What engines hold: one file per target; each says which grids it holds without loss, writes them and reads back."""
