// Trial: gelu_product_wide.cu with more and shorter stages.
#define LAMINA_DEPTH 32
#define LAMINA_FORWARD LaunchGeluProductDeep
#define LAMINA_BACKWARD LaunchGeluProductBackwardDeep
#include "gelu_product_wide.cu"
