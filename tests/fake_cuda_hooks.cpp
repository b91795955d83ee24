// autograd asks whether each device has a CUDA context, and without a GPU the answer is an error.
// `patch_hooks` gives the hooks' object a copy of its table of virtual functions that says "no".
#include <ATen/detail/CUDAHooksInterface.h>

#include <cstring>

static bool never(void*, c10::DeviceIndex) { return false; }

extern "C" void patch_hooks() {
  constexpr int before = 4, size = 160;  // entries in front of the table's address; entries in all
  static void* table[size];
  auto member = &at::AcceleratorHooksInterface::hasPrimaryContext;
  long offset;  // a pointer to a virtual member holds its place in the table, in bytes, plus 1
  std::memcpy(&offset, &member, sizeof offset);
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  void*** object = reinterpret_cast<void***>(&hooks);
  std::memcpy(table, *object - before, sizeof table);
  table[before + (offset - 1) / sizeof(void*)] = reinterpret_cast<void*>(&never);
  *object = table + before;
}
