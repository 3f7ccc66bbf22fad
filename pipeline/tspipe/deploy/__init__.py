"""What a trained student is for: loaded, folded, exported, run on images, and compared with its teacher."""
