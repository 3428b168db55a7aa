"""The networks: SK-ResNet, projection head, and the classifier form in which teachers and students meet the rest."""
