#include "nvtx.h"

#include <nvtx3/nvToolsExt.h>

namespace lamina::cuda {
namespace {

nvtxDomainHandle_t Domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("lamina");
  return domain;
}

}  // namespace

void BeginNvtxRange(const char* name, int64_t index) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  if (index >= 0) {
    attributes.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    attributes.payload.llValue = index;
  }
  nvtxDomainRangePushEx(Domain(), &attributes);
}

void EndNvtxRange() { nvtxDomainRangePop(Domain()); }

}  // namespace lamina::cuda
