"""From an SAE to a release on Neuronpedia: dashboards, a viewer of them, the import folder, the upload."""
