// Stand-in for libatb (NNAL): an operation's Setup logs the parameter type and its tensors as [shape:type:format], with
// ":host" behind one that lies in host memory. PARAMETERS stands for one line per parameter type that torch_npu creates.
#include <cstdint>
#include <string>
#include <vector>

extern "C" void stub_log(const char *format, const char *what);

namespace atb {
struct Tensor { int type, format; int64_t shape[8]; uint64_t dims; void *device, *host; uint64_t size; };
struct Tensors { size_t capacity, size; Tensor inside[65]; Tensor *outside; };
struct VariantPack { Tensors in, out; };

class Context {
public:
    virtual ~Context() {}
    virtual int SetExecuteStream(void *) { return 0; }
    virtual void *GetExecuteStream() const { return nullptr; }
    virtual int SetAsyncTilingCopyStatus(bool) { return 0; }
    virtual bool GetAsyncTilingCopyStatus() const { return false; }
    virtual int SetExecuteStreams(const std::vector<void *> &) { return 0; }
    virtual std::vector<void *> GetExecuteStreams() { return {}; }
    virtual int SetExecuteType(int) { return 0; }
    virtual int GetExecuteType() { return 0; }
    virtual int SetLaunchMode(int) { return 0; }
    virtual int GetLaunchMode() { return 0; }
};

static std::string describe(const Tensors &tensors) {
    std::string text;
    for (size_t i = 0; i < tensors.size; i++) {
        const Tensor &t = tensors.inside[i];
        text += " [";
        for (uint64_t k = 0; k < t.dims; k++) text += (k ? "," : "") + std::to_string(t.shape[k]);
        text += ":" + std::to_string(t.type) + ":" + std::to_string(t.format) + (t.host ? ":host]" : "]");
    }
    return text;
}

class Operation {
public:
    std::string name;
    virtual ~Operation() {}
    virtual std::string GetName() const { return name; }
    virtual int InferShape(const void *, void *) const { return 0; }
    virtual uint32_t GetInputNum() const { return 0; }
    virtual uint32_t GetOutputNum() const { return 0; }
    virtual int Setup(const VariantPack &pack, uint64_t &workspace, Context *) {
        workspace = 0;
        stub_log("%s\n", ("atb " + name + " in" + describe(pack.in) + " out" + describe(pack.out)).c_str());
        return 0;
    }
    virtual int Execute(const VariantPack &, uint8_t *, uint64_t, Context *) { return 0; }
};

int CreateContext(Context **out) { *out = new Context; return 0; }
int DestroyContext(Context *context) { delete context; return 0; }
int DestroyOperation(Operation *operation) { delete operation; return 0; }

struct Utils { static uint64_t GetTensorSize(const Tensor &); };
uint64_t Utils::GetTensorSize(const Tensor &tensor) {
    uint64_t count = tensor.dims ? 1 : 0;
    for (uint64_t i = 0; i < tensor.dims; i++) count *= tensor.shape[i];
    switch (tensor.type) {
        case 0: case 3: return count * 4;               // float, int32
        case 9: case 10: case 11: return count * 8;     // int64, uint64, double
        case 1: case 6: case 27: return count * 2;      // half, int16, bfloat16
        default: return count;
    }
}

template <class Parameter> int CreateOperation(const Parameter &, Operation **out) {
    std::string here = __PRETTY_FUNCTION__, mark = "Parameter = ";
    auto start = here.find(mark) + mark.size();
    *out = new Operation;
    (*out)->name = here.substr(start, here.size() - start - 1);
    return 0;
}

namespace infer {
PARAMETER_TYPES
}
INSTANCES
}

extern "C" {
C_INTERFACE
}
