// A driver library without a device: what codegen/triton/driver.py and the launches in cpp/call.h call of CUDA's, and of HIP's. It counts
// modules, and hands what each launch was given to a function of the test, which computes what the kernel would have.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

struct Module { const void* image; };
struct Function { std::string name; };

struct Seen {  // mirrored by fake_driver.py
  const char* name;
  void* function;
  uint32_t grid[3], threads, shared;
  void* stream;
  void* context;
  void** parameters;
};

static int next_error, modules, allowed_shared, most_threads = 1024;
static thread_local void* context;
static void (*handler)(const Seen*);

extern "C" {

void fake_handler(void (*function)(const Seen*)) { handler = function; }
void fake_fail(int error) { next_error = error; }
void fake_most_threads(int count) { most_threads = count; }
int fake_modules() { return modules; }
int fake_allowed_shared() { return allowed_shared; }

static int taken() { const int error = next_error; return next_error = 0, error; }

int cuInit(unsigned) { return taken(); }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void** found, int device) { return *found = (void*)(intptr_t)(0x1000 + device), 0; }
int cuCtxGetCurrent(void** found) { return *found = context, 0; }
int cuCtxSetCurrent(void* wanted) { return context = wanted, 0; }
int cuModuleLoadData(void** module, const void* image) {
  if (!context) return 201;
  if (const int error = taken()) return error;
  return *module = new Module{image}, modules++, 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) { return *function = new Function{name}, 0; }
int cuFuncGetAttribute(int* value, int attribute, void*) { return *value = attribute == 0 ? most_threads : 0, 0; }
int cuFuncSetAttribute(void*, int attribute, int value) { return allowed_shared = attribute == 8 ? value : -1, 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void* stream,
                   void** parameters, void** extra) {
  if (!context || extra) return 201;
  if (const int error = taken()) return error;
  const Seen seen{((Function*)function)->name.c_str(), function, {x, y, z}, threads, shared, stream, context, parameters};
  if (handler) handler(&seen);
  return 0;
}
int cuGetErrorName(int error, const char** text) {
  return *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : nullptr, *text ? 0 : 1;
}
int cuGetErrorString(int error, const char** text) {
  return *text = error == 700 ? "an illegal memory access was encountered" : nullptr, *text ? 0 : 1;
}

// HIP: threads choose a device by its number, and one is always chosen.
int hipInit(unsigned flags) { return cuInit(flags); }
int hipGetDevice(int* device) { return *device = (int)(intptr_t)context, 0; }
int hipSetDevice(int device) { return context = (void*)(intptr_t)device, 0; }
int hipModuleLoadData(void** module, const void* image) { return *module = new Module{image}, modules++, taken(); }
int hipModuleGetFunction(void** function, void* module, const char* name) { return cuModuleGetFunction(function, module, name); }
int hipFuncGetAttribute(int* value, int attribute, void* function) { return cuFuncGetAttribute(value, attribute, function); }
int hipModuleLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                          void* stream, void** parameters, void** extra) {
  if (extra) return 1;
  const Seen seen{((Function*)function)->name.c_str(), function, {x, y, z}, threads, shared, stream, context, parameters};
  if (handler) handler(&seen);
  return taken();
}
int hipDrvGetErrorName(int error, const char** text) { return *text = error == 719 ? "hipErrorLaunchFailure" : nullptr, 0; }
int hipDrvGetErrorString(int, const char** text) { return *text = nullptr, 0; }
}
