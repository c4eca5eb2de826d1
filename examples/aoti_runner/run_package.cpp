// run_package <libmla_fp8.so> <package.pt2> <inputs.pt> <outputs.pt>
//
// Loads the ops, then a package that AOTInductor made, runs it once, prints types and layouts of
// what it returns and writes that. Inputs are a list of tensors as torch.save writes it, outputs a
// tuple that torch.load reads, float8 as uint8. There is no Python in this process.
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

std::ifstream open_file(const std::string& name, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(name + " must be a readable file, got " + path);
  return file;
}

std::vector<char> read_inputs(const std::string& path) {
  std::ifstream file = open_file("inputs.pt", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_outputs(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("outputs.pt must be writable, got " + path);
}

void run(const std::string& library, const std::string& package, const std::string& inputs_path,
         const std::string& outputs_path) {
  // Loading registers torch.ops.mla_fp8, as torch.ops.load_library does in Python; it stays to the
  // end of the process.
  if (!dlopen(library.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());

  open_file("package.pt2", package);  // for an error that names it
  torch::inductor::AOTIModelPackageLoader loader(package);
  const c10::Device device(loader.get_metadata().at("AOTI_DEVICE_KEY"));

  const c10::IValue saved = torch::jit::pickle_load(read_inputs(inputs_path));
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& input : saved.toListRef()) {
    inputs.push_back(input.toTensor().to(device));
  }
  std::vector<c10::IValue> outputs;
  for (const at::Tensor& output : loader.run(inputs)) {
    const std::string layout = c10::str(output.sizes(), " strides ", output.strides());
    std::printf("%s %s\n", output.toString().c_str(), layout.c_str());
    // Python has no name for the storage that pickle_save gives a float8 tensor: its bytes are
    // written.
    outputs.emplace_back((at::isFloat8Type(output.scalar_type()) ? output.view(at::kByte) : output).cpu());
  }
  write_outputs(outputs_path, torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(outputs))));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: run_package <libmla_fp8.so> <package.pt2> <inputs.pt> <outputs.pt>\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argv[4]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what());
    return 1;
  }
  return 0;
}
