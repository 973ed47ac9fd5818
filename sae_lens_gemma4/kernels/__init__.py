"""What a sparse training step computes, without the products that are nearly all zeros."""
