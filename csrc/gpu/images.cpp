// Finds the kernel of a tile: in the image of its architecture and op that the build embedded, or
// in one that the registered loader makes (mla_fp8/jit.py compiles it) where there is none or the
// driver refuses it.
#include <atomic>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "gpu/driver.h"
#include "gpu/driver_abi.h"
#include "gpu/exports.h"

namespace mla_fp8::cuda {
namespace {

constexpr size_t kErrorBytes = 8192;  // a compiler's log
std::atomic<mla_fp8_image_loader> image_loader{nullptr};

const void* load_image(const char* op, const char* name, int device_index) {
  const mla_fp8_image_loader loader = image_loader.load(std::memory_order_acquire);
  if (loader == nullptr) {
    fail(op, text("the kernels of ", name,
                  " must be compiled, got a library built without nvcc: build it with nvcc 13 on the PATH, or call it "
                  "from Python with `pip install mla_fp8[cuda]`, which compiles them at first use"));
  }
  const void* image = nullptr;
  size_t size = 0;
  std::string error(kErrorBytes, '\0');
  const int result = loader(name, device_index, &image, &size, error.data(), error.size());
  if (result != 0 || image == nullptr) fail(op, error.c_str());
  return image;
}

// Kernels are found without a lock, added under it, and never removed: a captured graph may hold
// them.
std::atomic<abi::Handle> kernels[kMaxDevices][std::size(kTiles)];
std::mutex mutex;

struct Library {
  abi::Handle handle = nullptr;
  bool refused = false;  // the driver did not take the embedded image
};

std::map<std::string, Library>& libraries() {
  static auto* const map = new std::map<std::string, Library>;  // outlives static destruction
  return *map;
}

// Loading is not a stream operation: in a capture's thread it is allowed once the thread says so.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const abi::Driver& driver) : driver_(driver) { driver_.exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { driver_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const abi::Driver& driver_;
  int mode_ = abi::kCaptureModeRelaxed;
};

bool is_refusal(abi::Result result) {
  return result == abi::kErrorInvalidImage || result == abi::kErrorNoBinaryForGpu || result == abi::kErrorInvalidPtx ||
         result == abi::kErrorJitCompilerNotFound || result == abi::kErrorUnsupportedPtxVersion;
}

// Makes `kernel` ready to launch in the current context. `library` is made from `image` unless it
// is there already.
abi::Result load_kernel(const abi::Driver& driver, const void* image, const Tile& tile, abi::Ordinal device,
                        abi::Handle* library, abi::Handle* kernel) {
  if (*library == nullptr) {
    const abi::Result result = driver.library_load_data(library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (result != abi::kSuccess) return result;
  }
  abi::Result result = driver.library_get_kernel(kernel, *library, tile.symbol);
  if (result == abi::kSuccess && tile.smem_bytes > 0) {
    result = driver.kernel_set_attribute(abi::kFunctionMaxDynamicSharedSizeBytes, tile.smem_bytes, *kernel, device);
  }
  // Asking for the function loads the library into the context now; otherwise that would wait for
  // the launch.
  abi::Handle function = nullptr;
  return result == abi::kSuccess ? driver.kernel_get_function(&function, *kernel) : result;
}

}  // namespace

abi::Handle find_kernel(const char* op, int device_index, abi::Ordinal device, const Tile& tile, abi::Handle stream) {
  std::atomic<abi::Handle>& slot = kernels[device_index][&tile - kTiles.data()];
  if (const abi::Handle kernel = slot.load(std::memory_order_acquire)) return kernel;

  const abi::Driver& driver = driver_for(op);
  // The image's, and its source's below csrc/kernels/.
  const std::string name = text("sm", tile.capability, "/", op_name(tile.op));
  size_t size = 0;
  const void* embedded = mla_fp8_embedded_image(name.c_str(), &size);
  const void* made = nullptr;
  const RelaxedCapture relaxed(driver);
  for (;;) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (const abi::Handle kernel = slot.load(std::memory_order_acquire)) return kernel;
      Library& library = libraries()[name];
      const bool use_embedded = embedded != nullptr && !library.refused;
      if (library.handle != nullptr || use_embedded || made != nullptr) {
        abi::Handle kernel = nullptr;
        const void* image = use_embedded ? embedded : made;
        const abi::Result result = load_kernel(driver, image, tile, device, &library.handle, &kernel);
        if (result == abi::kSuccess) {
          slot.store(kernel, std::memory_order_release);
          return kernel;
        }
        if (!use_embedded || !is_refusal(result)) check(op, driver, result, text("loading ", tile.symbol));
        library = {nullptr, true};
      }
    }
    int capturing = abi::kCaptureNone;
    const abi::Result known = driver.stream_is_capturing(stream, &capturing);
    if (capturing != abi::kCaptureNone || known == abi::kErrorStreamCaptureImplicit) {
      fail(op, text("kernel ", tile.symbol,
                    " must be compiled before a stream capture, got its first call inside one: call "
                    "mla_fp8.jit.warm_up() or the op itself before the capture"));
    }
    // Without the lock: the loader may need Python's.
    made = load_image(op, name.c_str(), device_index);
  }
}

}  // namespace mla_fp8::cuda

void mla_fp8_set_image_loader(mla_fp8_image_loader loader) {
  mla_fp8::cuda::image_loader.store(loader, std::memory_order_release);
}
